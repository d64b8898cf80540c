"""Files and text: what is written to disk and shown to people. Imports no torch."""
