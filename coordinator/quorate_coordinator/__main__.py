"""`python -m quorate_coordinator` is `quorate`."""

from quorate_coordinator.cli.main import main

main()
