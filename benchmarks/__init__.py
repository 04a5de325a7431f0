"""What TG-Tinker costs, measured: `make bench`."""
