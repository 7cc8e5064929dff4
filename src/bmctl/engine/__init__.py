"""The shared engine: what runs in a worker process. torch may be imported at the top of these files."""
