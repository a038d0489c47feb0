"""`dsnet scaling`: what a training on many GPUs would take and cost."""

from dataclasses import dataclass

from ..errors import DenseShortcutError


@dataclass(frozen=True)
class Scaling:
    """Estimate time and cost of a training on many GPUs from one GPU's measured speed; docs/scaling.md has the sums."""

    images_per_second: float
    """Training speed of one GPU, as `dsnet bench` or a run's metrics give it."""
    price_per_hour: float = 1.0
    """Price of one GPU for one hour; 1 gives the cost in GPU hours."""
    model: str = "dsnet50"
    """Any timm name; its gradients are what the GPUs exchange."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of GPUs."""
    epochs: int = 90
    """Passes over the training images."""
    train_images: int = 1_281_167
    """Training images, ImageNet-1k's unless given."""
    batch_per_gpu: int = 256
    """Images a step on each GPU."""
    sync_bn: bool = False
    """With synchronised batch norms, which exchange two small messages each in a step."""
    gpus_per_machine: int = 8
    """GPUs of a machine."""
    inside: float = 450.0
    """Gigabytes a second in one direction between GPUs of a machine; NVLink of an H100 by its data sheet."""
    between: float = 12.5
    """Gigabytes a second in one direction between machines; a network of 100 Gbit/s."""
    latency: float = 10e-6
    """Seconds of one step of a ring, an assumption."""

    def run(self, line: str) -> None:
        import timm

        from ..experiments.command import dsnet
        from ..experiments.train import scaling

        if not timm.is_model(self.model):
            raise DenseShortcutError(f"unknown model {self.model!r}: `{dsnet('models')}` lists the DSNets.")
        found = scaling.messages(timm.create_model(self.model), sync_bn=self.sync_bn)
        cluster = scaling.Cluster(self.gpus_per_machine, self.inside, self.between, self.latency, self.price_per_hour)
        rows = scaling.estimates(
            found,
            self.gpus,
            cluster,
            images_per_second=self.images_per_second,
            batch_per_gpu=self.batch_per_gpu,
            images=self.epochs * self.train_images,
        )
        print(
            f"{self.model}: {found.gradients / 1e6:.1f} MB of gradients a step in {found.buckets} messages, "
            f"and {found.small} small ones\n"
        )
        print(scaling.markdown(rows))
