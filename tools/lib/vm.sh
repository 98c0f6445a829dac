# Makes what the demo and the tests with real virtual machines boot: source it, do not run it.
# shellcheck shell=bash

vm_folder=.build/vm

# A Debian kernel for virtual machines has its network card's driver in modules.
vm_modules=(
  virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net
)

# Made by this version of what makes it.
vm_is_there() { [ -f "$vm_folder/initrd" ] && [ "$vm_folder/vmlinuz" -nt tools/lib/vm.sh ]; }

# make_vm SCRATCH: puts `vmlinuz` and `initrd` into $vm_folder. The machine takes the address that its kernel's command
# line has (vm_address=), says BOOTED, and runs each line that it gets on its serial console. It has busybox, iperf3 and
# ethtool.
make_vm() {
  local scratch=$1 package module program library
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
  (cd "$scratch" && apt-get download "$package" && dpkg-deb --extract "$package"_*.deb kernel) >&2
  mkdir -p "$scratch"/root/{bin,modules,proc,sys,dev,tmp} "$vm_folder"
  cp /bin/busybox "$scratch/root/bin/busybox"
  for program in iperf3 ethtool; do
    # Some are only in root's path.
    program=$(PATH=$PATH:/usr/sbin command -v "$program")
    cp "$program" "$scratch/root/bin/"
    for library in $(ldd "$program" | grep --only-matching '/[^ ]*'); do
      mkdir -p "$scratch/root$(dirname "$library")"
      cp "$library" "$scratch/root$library"
    done
  done
  for module in "${vm_modules[@]}"; do
    find "$scratch/kernel" -name "$module.ko" -exec cp {} "$scratch/root/modules/" ';'
  done
  cat >"$scratch/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
# In whatever order they need each other.
for pass in 1 2 3; do
  for module in /modules/*; do insmod $module 2>/dev/null; done
done
ip link set lo up
# Quiet devices: no neighbour discovery between the measured packets.
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
ip link set eth0 up
ip address add "$(sed 's/.*vm_address=\([^ ]*\).*/\1/' /proc/cmdline)/24" dev eth0
stty -echo
echo BOOTED
while read -r line; do eval "$line"; done
exec sleep 1000000
INIT
  chmod +x "$scratch/root/init"
  (cd "$scratch/root" && find . | cpio --create --format=newc --quiet | gzip) >"$vm_folder/initrd"
  # Last: with it the folder counts as made.
  cp "$scratch"/kernel/boot/vmlinuz-* "$vm_folder/vmlinuz"
}
