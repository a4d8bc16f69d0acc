"""Starts the server from a checkout: python llmsrv.py --port 8000."""

if __name__ == "__main__":
    from llmsrv.cli import main

    raise SystemExit(main())
