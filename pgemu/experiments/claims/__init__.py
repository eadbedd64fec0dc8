"""Claims about the two designs, each with the experiment that tests it; pgemu.experiments.audit runs them."""
