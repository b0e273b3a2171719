"""Three kinds of user mistakes, and the failure of a server or disk, which is not the user's mistake.

A message reads `<key or file>: <what was found>; expected <what>. <what to do>.`
"""


class ConfigError(Exception):
    """A setting (YAML, command line, DeepSpeed JSON) is unknown, of the wrong type, or contradicts another."""


class DataError(Exception):
    """An image, an annotation, a shard or a record cannot be used."""


class CheckpointError(Exception):
    """A model folder or a training checkpoint is missing, incomplete or of another shape than expected."""


class ServerError(Exception):
    """A server of shards, or the file system of a run, did not answer in time.

    Another attempt may succeed, so Slurm may start the job again.
    """
