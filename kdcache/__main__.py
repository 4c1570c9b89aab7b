"""`python -m kdcache`."""

from kdcache.cli.app import main

if __name__ == "__main__":
    main()
