"""Search by measuring exported files: which layers suffer, which passes help, which assignment meets a budget."""
