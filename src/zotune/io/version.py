"""The version of zotune."""

VERSION = "0.1.0"
