"""Page tables of any format: walks, translations, edits."""
