"""Plans as native programs: one call of a library runs every step that it has a kernel for."""
