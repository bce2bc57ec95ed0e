"""A saved folder on the hub: `push`."""

from armour_surgery.sharing.upload import push

__all__ = ["push"]
