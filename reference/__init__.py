"""What the lessons compare with, and the programs that made it. Keeps TensorFlow quiet.

TensorFlow's libraries print greetings on stderr before they read any log level, and every
reader would find them under the first cell. Set TF_CPP_MIN_LOG_LEVEL=0 to see everything.
"""

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def _greetings_held_back():
    """Send stderr into a file; show that file if the import fails."""
    try:
        kept = os.dup(2)
    except OSError:  # closed, so there is nothing to hold back
        yield
        return
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(kept, aside.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3":  # perhaps from a parent process
    with (contextlib.suppress(ModuleNotFoundError),  # accelerated.py needs none
          contextlib.nullcontext() if "tensorflow" in sys.modules else _greetings_held_back()):
        import tensorflow as tf
        tf.get_logger().setLevel("ERROR")  # a new model is a new graph: no warning is due
