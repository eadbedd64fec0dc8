"""What must hold: the rules after each operation, and recounts."""
