"""The subcommands of `zotune`, one module each, with `main(argv) -> exit code`."""
