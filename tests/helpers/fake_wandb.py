"""A stand-in for the package wandb, which notes what it is asked for."""

from __future__ import annotations

import types


class FakeError(Exception):
    """Base of W&B's errors."""


class FakeUsageError(FakeError):
    pass


class FakeWandb(types.ModuleType):
    """Notes rows, their steps, and everything else that a writer asks of W&B.

    Args:
        server: `run.summary` of a run that is continued online; None: the server has none.
        refusals: errors that `init` raises, one at each call.
    """

    def __init__(self, server=None, refusals=()):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=FakeError, UsageError=FakeUsageError)
        self.Settings = types.SimpleNamespace(
            model_fields={"x_transaction_log_flush_interval", "finish_timeout"}
        )
        self.Histogram = lambda np_histogram: ("histogram", *map(list, np_histogram))
        self.Image = lambda pixels: ("image", pixels.tolist())
        self.server = server
        self.refusals = list(refusals)
        self.inits = []
        self.rows = []
        self.steps = []
        self.metrics = {}
        self.configs = []
        self.artifacts = []
        self.exit_codes = []
        self.broken: Exception | None = None

    def init(self, **options):
        self.inits.append(options)
        if self.refusals:
            raise self.refusals.pop(0)
        return types.SimpleNamespace(
            id=options["id"] or "new",
            resumed=self.server is not None,
            disabled=options["mode"] == "disabled",
            summary=self.server or {},
            define_metric=lambda name, **how: self.metrics.update({name: how}),
            config=types.SimpleNamespace(update=lambda c, **_: self.configs.append(c)),
            log=self.log,
            log_artifact=lambda artifact, aliases: self.artifacts.append((artifact, aliases)),
            finish=self.finish,
        )

    def log(self, values, step, commit):
        if self.broken:
            raise self.broken
        assert commit, "a row that waits for the next one is lost by a kill"
        self.rows.append(values)
        self.steps.append(step)

    def finish(self, exit_code):
        if self.broken:
            raise self.broken
        self.exit_codes.append(exit_code)

    def Artifact(self, name, type, metadata):
        artifact = types.SimpleNamespace(name=name, type=type, metadata=metadata, files={})
        artifact.add_file = lambda path, file: artifact.files.update({file: path})
        return artifact

    def iterations(self):
        """(kind, iteration) of every row."""
        named = [name for row in self.rows for name in row if name.endswith("/iteration")]
        kinds = [name.removesuffix("/iteration") for name in named]
        return [(kind, row["iteration"]) for kind, row in zip(kinds, self.rows, strict=True)]
