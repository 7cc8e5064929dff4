"""Processes of a job: started, met, watched, ended and started again."""
