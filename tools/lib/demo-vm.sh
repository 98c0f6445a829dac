# What `tools/demo --vm` shows: source it, do not run it. It uses the namespaces, processes and results of tools/demo.
# shellcheck shell=bash disable=SC2154,SC2034,SC2004
# shellcheck source=tools/lib/vm.sh
source tools/lib/vm.sh

# --- Virtual machines -------------------------------------------------------------------------------------------------

vm_boot_seconds=90 # software emulation on a busy machine is slow
declare -A console machine

# The network card of a virtual machine, by how its frames leave.
card_of_tap() { # card_of_tap DEVICE
  printf '%s\n' -netdev "tap,id=net,ifname=$1,script=no,downscript=no"
}
card_of_vhost_user() { # card_of_vhost_user SOCKET
  printf '%s\n' -chardev "socket,id=card,path=$1" -netdev vhost-user,id=net,chardev=card
}

# start_vm NAME HOST GUEST OPTIONS…: a virtual machine with guest A's or B's addresses, on host A or B.
start_vm() {
  local name=$1 host=$2 guest=$3
  local digit=${guest/A/a} mac input
  mac=02:00:00:00:00:0${digit/B/b}
  mkfifo "$state/$name.in"
  # Both ends are held open: nobody waits for another to open them.
  exec {input}<>"$state/$name.in"
  console[$name]=$input
  # The memory must be a file that can be shared. vectors=0: QEMU 7.2 crashes with vhost-user and MSI-X under software
  # emulation.
  ip netns exec "${namespace[host$host]}" qemu-system-x86_64 -accel tcg -m 256 -nodefaults -display none -no-reboot \
    -object memory-backend-memfd,id=memory,size=256M,share=on -machine memory-backend=memory \
    -kernel "$vm_folder/vmlinuz" -initrd "$vm_folder/initrd" \
    -append "console=ttyS0 quiet panic=-1 vm_address=$(guest_address "$guest")" \
    -serial mon:stdio \
    -device "virtio-net-pci,netdev=net,mac=$mac,romfile=,vectors=0" "${@:4}" \
    <"$state/$name.in" >"$state/$name.console" 2>"$state/$name.errors" &
  machine[$name]=$!
  processes+=("$!")
}

vm_says() { grep --quiet --text --fixed-strings "$2" "$state/$1.console"; } # vm_says NAME TEXT: whether it has said so
vm_ended() { [[ $(ps --no-headers -o stat -p "${machine[$1]}") != [!Z]* ]]; }
vm_says_or_ended() { vm_says "$1" "$2" || vm_ended "$1"; }

await_vm() { # await_vm NAME TEXT SECONDS
  until_true "$3" vm_says_or_ended "$1" "$2" || true
  vm_says "$1" "$2" || {
    tail -n 20 "$state/$1.console" "$state/$1.errors" >&2
    vm_ended "$1" && die "the virtual machine $1 ended before it said '$2'"
    die "the virtual machine $1 did not say '$2' within $3 s"
  }
}

vm_do() { printf '%s\n' "$2" >&"${console[$1]}"; } # vm_do NAME COMMAND

commands_run=0
vm_run() { # vm_run NAME SECONDS COMMAND: runs it to its end; `answer` is what it said
  commands_run=$((commands_run + 1))
  vm_do "$1" "echo BEGIN-$commands_run; $3; echo END-$commands_run"
  await_vm "$1" "END-$commands_run" "$2"
  answer=$(tr --delete '\r' <"$state/$1.console" | sed "1,/^BEGIN-$commands_run\$/d; /^END-$commands_run\$/,\$d")
}

# The monitor shares the console's stream: control-A and C change to it and back.
monitor() { printf '\001c%s\n\001c' "$2" >&"${console[$1]}"; } # monitor NAME COMMAND

stop_vm() { # stop_vm NAME
  kill "${machine[$1]}" 2>/dev/null || true
  wait "${machine[$1]}" 2>/dev/null || true
  local input=${console[$1]}
  exec {input}>&-
  rm "$state/$1.in"
}

boot_vms() { # boot_vms CARD_OPTIONS_OF: a function that prints the card's options for host A or B
  local x options
  for x in A B; do
    mapfile -t options < <("$1" $x)
    start_vm "$x" $x $x "${options[@]}"
  done
  for x in A B; do await_vm $x BOOTED "$vm_boot_seconds"; done
}

# --- Two ways between them --------------------------------------------------------------------------------------------

tap_of() { card_of_tap vm1; }
socket_of() { card_of_vhost_user "$state/vm1$1.sock"; }

kernel_overlay_up() { # the kernel's own: a bridge with the TAP device and a VXLAN device
  local x device
  for x in A B; do
    ip -n "${namespace[host$x]}" link add bridge mtu 1500 type bridge forward_delay 0 mcast_snooping 0
    ip -n "${namespace[host$x]}" link add vxlan mtu 1500 type vxlan id 42 local "$(host_address $x)" \
      remote "$(host_address "$(other $x)")" dstport 4789 dev nic
    ip -n "${namespace[host$x]}" tuntap add dev vm1 mode tap
    for device in vxlan vm1; do ip -n "${namespace[host$x]}" link set "$device" master bridge; done
    for device in bridge vxlan vm1; do ip -n "${namespace[host$x]}" link set "$device" up; done
  done
}

kernel_overlay_down() {
  local x device
  for x in A B; do
    for device in vm1 vxlan bridge; do ip -n "${namespace[host$x]}" link delete "$device"; done
  done
}

measure_vms() { # measure_vms ROW
  say "$1: 10 pings"
  vm_run A 30 "ping -c 10 -A -q $(guest_address B)"
  [[ $answer == *' 0% packet loss'* ]] || die "$1: guest B does not answer guest A: $answer"
  say "$1: 3,000 round trips"
  vm_run A 60 "ping -c 3000 -A -q $(guest_address B)"
  [[ $answer == *round-trip* ]] || die "$1: the ping ended with: $answer"
  result[$1,rtt]=$(awk -F/ '/^round-trip/ { print $4 * 1000 }' <<<"$answer")
  vm_do B 'iperf3 --server >/dev/null &'
  local sender flags
  for sender in A B; do
    flags=''
    if [ $sender = B ]; then flags=--reverse; fi
    say "$1: TCP for $seconds s, guest $sender sends"
    sleep 1
    vm_run A $((seconds + 30)) "iperf3 --client $(guest_address B) --time $seconds --format k $flags"
    [[ $answer == *receiver* ]] || die "$1: iperf3 ended with: $answer"
    result[$1,$sender]=$(awk '/receiver/ { print $(NF - 2) / 1e6 }' <<<"$answer")
  done
}

through_kernel() { # through_kernel ROW
  local x
  say "$1: each guest's TAP device in a bridge with a VXLAN device"
  kernel_overlay_up
  boot_vms tap_of
  measure_vms "$1"
  for x in A B; do stop_vm "$x"; done
  kernel_overlay_down
}

# --- Migration --------------------------------------------------------------------------------------------------------

migration_seconds=20 # of TCP, in which the migration happens
migration_port=4444

migration_ended() {
  monitor A 'info migrate'
  sleep 0.2
  vm_says A 'Migration status: completed' || vm_says A 'Migration status: failed'
}

migration_value() { # migration_value NAME: of the monitor's last answer, in ms
  tr --delete '\r' <"$state/A.console" |
    awk -F': ' -v name="$1" '$1 == name { sub(/ .*/, "", $2); value = $2 } END { print value }'
}

migrate() {
  local start moved options
  say "host B: a virtual machine waits for guest A at the port vm2"
  mapfile -t options < <(card_of_vhost_user "$state/vm2B.sock")
  start_vm moved B A "${options[@]}" -incoming "tcp:$(host_address B):$migration_port"
  vm_do B "killall iperf3; iperf3 --server --one-off --interval 1 --format k >/seconds &"
  sleep 1
  say "guest A sends to guest B over one TCP connection for $migration_seconds s, and moves from host A to host B"
  vm_do A "iperf3 --client $(guest_address B) --time $migration_seconds >/sent 2>&1; echo SENT-ALL"
  sleep 6
  start=$SECONDS
  monitor A "migrate -d tcp:$(host_address B):$migration_port"
  until_true 60 migration_ended || true
  if ! vm_says A 'Migration status: completed' || vm_ended moved; then
    tail -n 20 "$state/A.console" "$state/moved.errors" >&2
    die 'the migration failed'
  fi
  moved=$((SECONDS - start))
  stop_vm A
  say "guest A is on host B now, $moved s after the monitor was told; its connection goes on"
  await_vm moved SENT-ALL $((migration_seconds + 60))
  vm_run B 20 'cat /seconds'
  print_migration <<<"$answer"
  vm_run moved 30 "ping -c 10 -A -q $(guest_address B)"
  [[ $answer == *' 0% packet loss'* ]] || die "guest A does not reach guest B after it moved: $answer"
}

print_migration() { # from the server's report
  echo
  echo "migration of guest A: $(migration_value 'total time') ms in all, stopped for $(migration_value downtime) ms"
  echo 'its TCP connection, second by second, as guest B received it:'
  awk '
    /sec.*bits\/sec/ && !/receiver/ {
      for (field = 1; field <= NF; field++) if ($field ~ /bits\/sec/) rate[++count] = $(field - 1) / 1e6
      if (rate[count] > most) most = rate[count]
    }
    END {
      for (second = 1; second <= count; second++) {
        bar = ""
        for (mark = 0; mark < 50 * rate[second] / (most > 0 ? most : 1); mark++) bar = bar "#"
        printf "%4d s %6.2f Gb/s  %s\n", second, rate[second], bar
      }
    }'
}

# --- The show ---------------------------------------------------------------------------------------------------------

print_vm_table() {
  local row
  printf '\n%42s%18s%21s\n' 'round trip' 'TCP, A sends' 'TCP, B sends'
  echo 'way                              µs  ratio       Gb/s  ratio          Gb/s  ratio'
  for row in "$@"; do
    printf '%-27s' "$row"
    awk -v row="${result[$row,rtt]} ${result[$row,A]} ${result[$row,B]}" \
      -v base="${result[$1,rtt]} ${result[$1,A]} ${result[$1,B]}" 'BEGIN {
        split(row, value); split(base, first)
        printf "%8.0f %6.2f %10.2f %6.2f %13.2f %6.2f\n", value[1], value[1] / first[1], value[2], value[2] / first[2],
          value[3], value[3] / first[3]
      }'
  done
}

show_vms() {
  local kernel='TAP, kernel VXLAN' ours='vhost-user, vnetr VXLAN' x
  join_hosts
  through_kernel "$kernel"
  say "$ours: each guest's rings are its host's forwarder's, which has a link to the other host"
  for x in A B; do start_forwarder "$ours" $x; done
  for x in A B; do await_forwarder $x; done
  boot_vms socket_of
  measure_vms "$ours"
  print_vm_table "$kernel" "$ours"
  migrate
  for x in moved B; do stop_vm $x; done
  for x in A B; do stop_forwarder "$ours" $x; done
  echo
}
