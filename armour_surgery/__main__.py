"""`python -m armour_surgery` is the command line."""

from armour_surgery.cli import main

main()
