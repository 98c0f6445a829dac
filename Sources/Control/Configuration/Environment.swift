import CLinux
import Datapath
import Glibc

/// What a configuration asks of the host that it is for; tests give their own.
public struct ConfigurationEnvironment: Sendable {
  /// What a look-up of a host name gave.
  public enum Resolution: Equatable, Sendable {
    /// In the order of preference (RFC 6724); at least one.
    case addresses([UnderlayAddress])
    /// Why there is none.
    case failure(String)
  }

  /// The host's name.
  public var hostName: @Sendable () -> String
  /// The addresses of a host name.
  public var resolve: @Sendable (String) -> Resolution
  /// The source address of the kernel's route to an address; nil where there is no route.
  public var localAddress: @Sendable (UnderlayAddress) -> UnderlayAddress?
  /// The CPUs that the machine runs, ascending; nil where that is not known.
  public var cpusOnline: @Sendable () -> [Int]?
  /// The CPUs that this process may use, ascending.
  public var cpusAllowed: @Sendable () -> [Int]

  public init(
    hostName: @escaping @Sendable () -> String, resolve: @escaping @Sendable (String) -> Resolution,
    localAddress: @escaping @Sendable (UnderlayAddress) -> UnderlayAddress?,
    cpusOnline: @escaping @Sendable () -> [Int]?, cpusAllowed: @escaping @Sendable () -> [Int]
  ) {
    self.hostName = hostName
    self.resolve = resolve
    self.localAddress = localAddress
    self.cpusOnline = cpusOnline
    self.cpusAllowed = cpusAllowed
  }

  /// This host: gethostname, getaddrinfo, the kernel's routes, its CPUs and this thread's affinity.
  public static let system = ConfigurationEnvironment(
    hostName: systemHostName, resolve: systemResolve, localAddress: systemLocalAddress,
    cpusOnline: systemCPUsOnline, cpusAllowed: ProcessorSet.allowed)
}

private func systemCPUsOnline() -> [Int]? {
  guard let bytes = try? readFile("/sys/devices/system/cpu/online", bytesMax: 1 << 16) else { return nil }
  return cpus(ofKernelList: String(decoding: bytes, as: UTF8.self))
}

private func systemHostName() -> String {
  // POSIX: a host name has at most 255 bytes (_POSIX_HOST_NAME_MAX).
  var name = [CChar](repeating: 0, count: 256)
  guard unsafe gethostname(&name, name.count - 1) == 0, name[0] != 0 else { return "localhost" }
  return String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
}

private func systemResolve(_ name: String) -> ConfigurationEnvironment.Resolution {
  var hints = unsafe addrinfo()
  unsafe hints.ai_family = AF_UNSPEC
  unsafe hints.ai_socktype = Int32(SOCK_DGRAM.rawValue)
  var list: UnsafeMutablePointer<addrinfo>?
  let status = unsafe getaddrinfo(name, nil, &hints, &list)
  guard status == 0 else { return .failure(unsafe String(cString: gai_strerror(status))) }
  defer { unsafe freeaddrinfo(list) }
  var addresses: [UnderlayAddress] = []
  var next = unsafe list
  while let entry = unsafe next {
    if let address = unsafe ipAddress(of: entry.pointee.ai_addr), !addresses.contains(address) {
      addresses.append(address)
    }
    unsafe next = entry.pointee.ai_next
  }
  return addresses.isEmpty ? .failure("it has no IPv4 or IPv6 address") : .addresses(addresses)
}

/// Connecting a datagram socket sends nothing, but makes the kernel choose the route and with it the source address.
private func systemLocalAddress(toward remote: UnderlayAddress) -> UnderlayAddress? {
  let family = remote.family == .ipv4 ? AF_INET : AF_INET6
  let descriptor = socket(family, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
  guard descriptor >= 0 else { return nil }
  defer { close(descriptor) }
  // Any port will do: no datagram is sent. 9 is the discard service.
  guard connectDatagramSocket(descriptor, to: remote, port: 9) else { return nil }
  var storage = sockaddr_storage()
  var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
  return unsafe withUnsafeMutablePointer(to: &storage) { pointer in
    unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
      guard unsafe getsockname(descriptor, address, &length) == 0 else { return nil }
      return unsafe ipAddress(of: address)
    }
  }
}

private func connectDatagramSocket(_ descriptor: CInt, to remote: UnderlayAddress, port: UInt16) -> Bool {
  switch remote.family {
  case .ipv4:
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(truncatingIfNeeded: remote.low).bigEndian
    return unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0
      }
    }
  case .ipv6:
    var address = sockaddr_in6()
    address.sin6_family = sa_family_t(AF_INET6)
    address.sin6_port = port.bigEndian
    let words = [remote.high.bigEndian, remote.low.bigEndian]
    unsafe withUnsafeMutableBytes(of: &address.sin6_addr) { target in
      unsafe words.withUnsafeBytes { unsafe target.copyMemory(from: $0) }
    }
    return unsafe withUnsafePointer(to: &address) { pointer in
      unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        unsafe connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_in6>.size)) == 0
      }
    }
  }
}

/// The IP address of a socket address; nil for other families. The caller vouches that the pointer, unless nil, leads
/// to a whole address of the family that it says.
@unsafe private func ipAddress(of address: UnsafePointer<sockaddr>?) -> UnderlayAddress? {
  guard let address = unsafe address else { return nil }
  switch unsafe Int32(address.pointee.sa_family) {
  case AF_INET:
    return unsafe address.withMemoryRebound(to: sockaddr_in.self, capacity: 1) { pointer in
      unsafe UnderlayAddress(ipv4: UInt32(bigEndian: pointer.pointee.sin_addr.s_addr))
    }
  case AF_INET6:
    return unsafe address.withMemoryRebound(to: sockaddr_in6.self, capacity: 1) { pointer in
      unsafe withUnsafeBytes(of: pointer.pointee.sin6_addr) { bytes in
        unsafe UnderlayAddress(
          high: UInt64(bigEndian: bytes.loadUnaligned(as: UInt64.self)),
          low: UInt64(bigEndian: bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self)))
      }
    }
  default:
    return nil
  }
}
