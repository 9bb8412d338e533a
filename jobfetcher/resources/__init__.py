"""What this machine has (detect) and who holds how much of it (budget)."""
