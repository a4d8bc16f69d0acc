"""llmsrv selftest: checks a backend against the reference backend on this very machine."""
