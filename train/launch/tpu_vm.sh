#!/bin/bash
# Start with: bash THIS_FILE, on a machine with gcloud; bash THIS_FILE stop makes the run save and end. All hosts of the
# slice run the same command and find each other by JAX. The folder it runs in must be on a disk that they share.
set -euo pipefail

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh %%{name} --zone=%%{zone} --worker=all --command="$1"
}

train=$(
  cat << 'END_OF_TRAIN'
cd %%{workdir} || exit 1
%%{command} &
trainer=$!
echo "$trainer" > /tmp/longctx-%%{name}.pid
trap 'kill -TERM "$trainer"' TERM INT HUP
# A spot TPU is told some seconds before it is taken: the run saves.
(
  while kill -0 "$trainer" 2> /dev/null; do
    preempted=$(curl --silent --fail --header 'Metadata-Flavor: Google' \
      http://metadata.google.internal/computeMetadata/v1/instance/preempted)
    if [ "$preempted" = TRUE ]; then
      kill -TERM "$trainer"
      break
    fi
    sleep 5
  done
) &
wait "$trainer"
code=$?
if kill -0 "$trainer" 2> /dev/null; then # the first wait was cut short by a signal
  wait "$trainer"
  code=$?
fi
exit "$code"
END_OF_TRAIN
)

if [ "${1:-}" = stop ]; then
  on_all_hosts 'kill -TERM "$(cat /tmp/longctx-%%{name}.pid)"'
  exit
fi

# A run that failed resumes from its last complete checkpoint. Exit code 2 is a wrong config: it would fail again.
for attempt in $(seq 0 %%{restarts}); do
  code=0
  on_all_hosts "$train" || code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
    break
  fi
  echo "attempt $attempt ended with exit code $code" >&2
done
exit "$code"
