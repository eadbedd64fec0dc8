"""The loops over operations, and which of them runs what."""
