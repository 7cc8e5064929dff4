"""From a package to artifacts, their proof, and predictions by them."""
