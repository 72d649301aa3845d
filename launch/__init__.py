"""How a recipe gets onto machines."""
