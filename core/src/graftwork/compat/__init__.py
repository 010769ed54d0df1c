"""Private seams of the libraries below, each in one small module with the version range it was tested with."""
