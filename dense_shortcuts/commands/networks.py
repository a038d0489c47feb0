"""`dsnet models`: which networks there are."""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Models:
    """List the DSNets."""

    pattern: tyro.conf.Positional[str] = ""
    """A wildcard such as 'ds2*'."""

    def run(self, line: str) -> None:
        from ..models import list_models

        print("\n".join(list_models(self.pattern)))
