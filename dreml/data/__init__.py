"""Images, lists of images, the data sets that are known by name, and their caches."""
