"""What a name may be in a file system that is no regular file, and who reads a FIFO."""

import os
import socket
import stat
import threading
import time

import pytest


def make_socket(path):
    folder = os.getcwd()
    os.chdir(path.parent)  # its whole path may be longer than an address may be
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(folder)


def make_block_device(path):
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 250))
    except OSError as error:
        pytest.skip(f"no block device can be made here: {error}")


# Never written to: how each is made, and what is said of it.
REFUSED = {
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "socket": (make_socket, "is a socket"),
    "block device": (make_block_device, "is a block device"),
    "loop": (lambda path: path.symlink_to(path.name), "link that leads back to itself"),
    "link into nowhere": (lambda path: path.symlink_to("no/folder/x"), "whose folder does not exist"),
}
# Streamed to where a single file of bytes was asked for.
STREAMED = {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/null")}


class Reader:
    """Reads a FIFO from now on; after `with Reader(path) as got` all that was written there is in `got`."""

    def __init__(self, path):
        self.handle, self.got, self.ended = os.open(path, os.O_RDONLY | os.O_NONBLOCK), bytearray(), False
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        while True:
            ended = self.ended  # before the read: what was written by then is there
            try:
                data = os.read(self.handle, 1 << 16)
            except BlockingIOError:
                data = b""
            self.got += data
            if not data and ended:
                return
            time.sleep(0 if data else 0.001)

    def __enter__(self):
        return self.got

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()
        os.close(self.handle)
