"""The machinery around the method: console, files, data, runs, search, figures. The scripts above import it."""
