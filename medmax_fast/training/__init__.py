"""What `medmax train` stands on: the DeepSpeed engine, and the files of a run folder."""
