"""Run folders: what defines a run, reading and writing one, going on within a member."""
