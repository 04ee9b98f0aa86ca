"""Our rows on an object store, beside ours in a local folder: time, and requests to the store."""

from fingerprint import fingerprint
from samples import Samples, measured
from timed import Sample
from walfleet import Walfleet


def measure(samples: Samples, ours: Walfleet):
    if samples.rows.wants("full_s3", "restore_s3", "changed_s3"):
        with samples.attempt("rows on S3", needed=False):
            S3(samples, ours).measure()
        samples.cluster.remove()
        ours.end()
        ours.store.end()


class S3:
    def __init__(self, samples: Samples, ours: Walfleet):
        self.samples, self.ours, self.cluster, self.wants = samples, ours, samples.cluster, samples.rows.wants
        self.report = samples.report
        self.numbers = range(samples.place.sizes.further_samples + 1)  # 0 is a warm-up

    def measure(self):
        self.report.settings["object_store"] = f"{self.ours.store.name} on this machine, without TLS"
        self.cluster.renew()
        full = []
        for number in self.numbers if self.wants("full_s3") else [0]:
            full += self.samples.note("full_s3", self.ours, self.samples.full(self.ours, "full_s3"), number)
        self.add("full", full)
        if self.wants("restore_s3"):
            self.samples.sources[self.ours.name] = fingerprint(self.cluster.data)
            self.cluster.remove()  # restores need its room
            taken = []
            for number in self.numbers:
                sample = self.samples.restore(self.ours, "restore_s3")
                taken += self.samples.note("restore_s3", self.ours, sample, number)
            self.add("restore", taken)
        if self.wants("changed_s3"):
            self.changes()

    def changes(self):
        self.cluster.renew()
        self.samples.serve(self.ours)
        self.samples.backup(self.ours, "first", self.ours.full_backup())
        taken = []
        for salt in self.numbers[1:]:
            self.cluster.change(salt)
            sample = self.samples.backup(self.ours, "changed_s3", self.ours.next_backup())
            taken += self.samples.note("changed_s3", self.ours, sample, salt)
        self.samples.unserve()
        self.add("changed", taken)

    def add(self, row: str, taken: list[Sample]):
        """Beside what the report has of the same row in a local folder, from this run or a run that it is added to."""
        if not taken:
            return
        local = [Sample(**{name: value for name, value in sample.items() if name != "clean"})
                 for sample in self.report.runs.get(f"backup.{row}", {}).get("walfleet", [])]
        for suffix, field in [("", "wall"), ("_cpu", "cpu")]:
            self.report.add(f"backup.{row}_s3{suffix}", measured(taken, field, 1), measured(local, field, 1), "local folder", "s")
        # Told alone: they depend on how many backups lie in the repository, and the local folder has seen more.
        if all(sample.requests is not None for sample in taken):
            self.report.add(f"backup.{row}_s3_requests", measured(taken, "requests", 1), None, "", "requests")
