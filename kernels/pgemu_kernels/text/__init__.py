"""Text of logs, read as bytes."""
