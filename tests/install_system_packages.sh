#!/bin/sh
# Get strace, which some tests use to see every system call of a checkpoint write. Never fails by itself: without strace
# those tests are skipped loudly, and fail under CI=true.
set -u

if command -v strace >/dev/null 2>&1; then
    exit 0
fi

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "strace is missing: installing it with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q && apt-get install -q -y --no-install-recommends strace
fi

if ! command -v strace >/dev/null 2>&1; then
    {
        echo "WARNING: strace is missing and could not be installed here; the tests that need it will be SKIPPED."
        echo "WARNING: install it as root (Debian, Ubuntu: apt-get install strace) and run again."
    } >&2
fi
