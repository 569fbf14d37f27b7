"""Who executes integers: `reference`, PyTorch, is the definition; each other backend equals it bit for bit."""
