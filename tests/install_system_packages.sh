#!/bin/sh
# Get strace, which some tests use to see every system call of a checkpoint write, and mkfs.ext4, mkfs.xfs and mount, with which others
# cut the power of a file system. Never fails by itself: without them those tests are skipped loudly, and fail under CI=true.
set -u

wanted() {
    for pair in strace:strace mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mount:mount; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || printf '%s ' "${pair#*:}"
    done
}

PATH="$PATH:/usr/sbin:/sbin"
packages=$(wanted)
if [ -z "$packages" ]; then
    exit 0
fi

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "missing: $packages- installing with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # several names
    apt-get update -q && apt-get install -q -y --no-install-recommends $packages
fi

packages=$(wanted)
if [ -n "$packages" ]; then
    {
        echo "WARNING: missing, and could not be installed here: $packages- the tests that need it will be SKIPPED."
        echo "WARNING: install it as root (Debian, Ubuntu: apt-get install $packages) and run again."
    } >&2
fi
