# Sourced by the other scripts: a virtual environment in .venv with requirements.txt, made once, and again when they change.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
if [ ! -f .venv/requirements.txt ] || ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "installing requirements.txt into .venv"
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
fi
. .venv/bin/activate
