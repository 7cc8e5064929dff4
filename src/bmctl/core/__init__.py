"""What plug-ins and the engine both stand on: files, numbers and layers, with no knowledge of a recipe."""
