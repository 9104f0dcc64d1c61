"""The Backend contract as tests."""

from __future__ import annotations

from kvstore.backends.contract import Backend
from kvstore.testing.object_promises import ObjectPromises
from kvstore.testing.store_promises import StorePromises


class BackendConformance(ObjectPromises, StorePromises):
    """What every backend must do. Make a subclass whose name begins with Test and give it `make_backend`.

        class TestMyBackend(BackendConformance):
            @pytest.fixture(autouse=True)
            def store(self, tmp_path):
                self.folder = tmp_path

            def make_backend(self):
                return MyBackend(self.folder)

    The store may hold other objects: a test touches only names below a random prefix, and deletes
    them at its end.
    """

    objects_may_be_folders = True
    """False where `a` and `a/b` cannot both be objects; putting the second one is a MisconfiguredError."""
    timeout_s = 60.0
    """The most one test may take."""

    def make_backend(self) -> Backend:
        """Open an instance. Instances of one test are independent, and see the same objects.

        Called inside the event loop that will use the instance; the suite closes it.
        """
        raise NotImplementedError(f"{type(self).__name__} must say in make_backend() how to open a backend")
