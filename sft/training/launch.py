"""Start one process per GPU of this host with torchrun; the exit code is the ranks' own.

    python -m sft.training.launch --ranks 8 train_sft.py --deepspeed ds_zero2_config.json ...
    python -m sft.training.launch --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 train_sft.py ...   on each host

SIGTERM, Ctrl-C and a closing terminal reach every rank; GRACE_SECONDS later (default 25) they are killed.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

import psutil
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from sft.program import (
    KEYBOARD_INTERRUPT,
    ArgumentParser,
    EarlyEndError,
    InterruptedRunError,
    UserError,
    WastedRunError,
    one_line,
    run_program,
)

MASTER_PORT = 29500  # torchrun's default; several hosts must agree on one


class RankEndedError(EarlyEndError):
    """The end of a rank that could not give the reason itself."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; raise UserError if there is no GPU for the ranks asked for."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="processes on this host; by default one per visible GPU")
    parser.add_argument("--cpu", action="store_true", help="run the ranks on the CPU")
    parser.add_argument("--nnodes", type=int, default=1, help="number of hosts")
    parser.add_argument("--node_rank", type=int, default=0, help="index of this host, from 0")
    parser.add_argument("--master_addr", default="", help="the address of host 0")
    parser.add_argument("--master_port", type=int, default=0, help="a port on host 0; a single host takes any free one")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if not given.cpu:
        import torch

        there = torch.cuda.device_count()
        if not there:
            raise UserError("no GPU is visible here; type DEVICE=cpu NUM_GPUS=2 for two ranks on the CPU")
        given.ranks = given.ranks or there
        if not 0 < given.ranks <= there:
            raise UserError(f"NUM_GPUS {given.ranks} must be from 1 to {there}, the number of visible GPUs")
    given.ranks = 2 if given.ranks is None else given.ranks
    if given.ranks < 1:
        raise UserError(f"NUM_GPUS {given.ranks} must be 1 or more")
    if given.nnodes > 1 and not given.master_addr:
        raise UserError("NNODES needs MASTER_ADDR: give the address of host 0, the same on every host")
    if not 0 <= given.node_rank < given.nnodes:
        raise UserError(f"NODE_RANK {given.node_rank} must be from 0 to {given.nnodes - 1}; number the hosts from 0")
    return given


def torchrun_arguments(given: argparse.Namespace) -> list[str]:
    """Return torchrun's own command line."""
    if given.nnodes == 1 and not given.master_port:
        meeting = ["--standalone"]  # on a free port
    else:
        meeting = [f"--nnodes={given.nnodes}", f"--node_rank={given.node_rank}"]
        meeting += [f"--master_addr={given.master_addr or '127.0.0.1'}"]
        meeting += [f"--master_port={given.master_port or MASTER_PORT}"]
    # Signals are passed on here: torchrun would kill ranks that are saving, and lose their exit code.
    return [*meeting, f"--nproc_per_node={given.ranks}", "--signals_to_handle=SIGQUIT", given.script] + (
        given.script_arguments
    )


def interface_towards(address: str, port: int) -> str | None:
    """Return the network interface through which this host reaches another, None if it has none."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {address} cannot be reached: {one_line(error)}; give an address of host 0"
        ) from None
    addresses = psutil.net_if_addrs()
    return next((name for name, own_ones in addresses.items() if own in [one.address for one in own_ones]), None)


def pass_on(signal_number: int, grace_seconds: float) -> None:
    """Send a signal to every rank and kill those still running after a while; exit at once if there is none yet."""
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + signal_number)  # torchrun may be waiting for another host, and would go on
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(signal_number)

    def kill() -> None:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                for process in (*rank.children(recursive=True), rank):
                    process.kill()

    timer = threading.Timer(grace_seconds, kill)
    timer.daemon = True
    timer.start()


def listen(grace_seconds: float) -> None:
    """Pass signals on from a thread: torchrun may be waiting for another host without handling them.

    A closing terminal is passed on too, unless nohup has it ignored.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    heard = [signal.SIGTERM, signal.SIGINT]
    heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    for signal_number in heard:
        signal.signal(signal_number, lambda number, frame: None)

    def wait() -> None:
        while signal_number := os.read(reading, 1)[0]:
            if signal_number in heard:  # torchrun handles others itself
                pass_on(signal_number, grace_seconds)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run the ranks; end with the exit code of the first that fails."""
    given = parse_arguments()
    cores = max(1, (os.cpu_count() or 1) // given.ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # torchrun would set one, too few for offloaded states
    if given.nnodes > 1 and (interface := interface_towards(given.master_addr, given.master_port or MASTER_PORT)):
        # Otherwise ranks exchange the address of their host's name, which is often 127.0.0.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks give the reason themselves
    try:
        grace_seconds = float(os.environ.get("GRACE_SECONDS", 25))
    except ValueError:
        raise UserError(f"GRACE_SECONDS is {os.environ['GRACE_SECONDS']}; expected a number of seconds") from None
    listen(grace_seconds)
    try:
        torchrun.main(torchrun_arguments(given))
    except ChildFailedError as failed:
        end_like(failed)
    except (DistError, RendezvousError) as error:
        place = f"{given.master_addr or '127.0.0.1'}:{given.master_port or MASTER_PORT}"
        raise UserError(f"the ranks cannot meet at {place}: {one_line(error)}; give another MASTER_PORT") from None


def end_like(failed: ChildFailedError) -> NoReturn:
    """Exit with the code of the first rank that failed; raise RankEndedError if it could not print the reason."""
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if code in (UserError.exit_code, WastedRunError.exit_code, InterruptedRunError.exit_code, KEYBOARD_INTERRUPT):
        sys.exit(code)
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    end = RankEndedError(f"rank {rank} ended with {how}, and the others with it; see its output above")
    end.exit_code = code if code > 0 else 128 - code
    raise end


if __name__ == "__main__":
    run_program(main)
