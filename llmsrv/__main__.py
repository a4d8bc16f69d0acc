"""`python -m llmsrv`: the same as llmsrv.py in a checkout."""

if __name__ == "__main__":
    from llmsrv.cli import main

    raise SystemExit(main())
