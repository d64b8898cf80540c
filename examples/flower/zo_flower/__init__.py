"""A Flower app that fine-tunes a language model by journal records: see `task`, `client_app` and `server_app`."""
