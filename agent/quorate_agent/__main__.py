"""`python -m quorate_agent`."""

from quorate_agent.cli import main

if __name__ == "__main__":
    main()
