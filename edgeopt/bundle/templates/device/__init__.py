"""What `device/` of a bundle holds. The package in it is also what `edgeopt device run` uses."""
