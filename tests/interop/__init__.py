"""The mock API held to what deployed servers answered."""
