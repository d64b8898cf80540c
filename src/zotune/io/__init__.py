"""Files and text, without torch."""
