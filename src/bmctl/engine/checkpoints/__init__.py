"""What a training keeps on the disk to go on from."""
