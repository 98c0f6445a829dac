/// EtherType values (IANA "IEEE 802 Numbers"). A field below 0x0600 is a length (IEEE 802.3 §3.2.6).
public enum EtherType {
  @inlinable @inline(always) public static var ipv4: UInt16 { 0x0800 }
  @inlinable @inline(always) public static var arp: UInt16 { 0x0806 }
  @inlinable @inline(always) public static var ipv6: UInt16 { 0x86dd }
  /// The customer tag of IEEE 802.1Q.
  @inlinable @inline(always) public static var vlan: UInt16 { 0x8100 }
  /// The service tag of IEEE 802.1ad.
  @inlinable @inline(always) public static var vlanService: UInt16 { 0x88a8 }
}

/// The Ethernet header: destination, source, EtherType (IEEE 802.3 §3.1.1). A frame has no FCS here.
public struct EthernetHeader: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of the header, tags not counted.
  @inlinable @inline(always)
  public static var bytes: Int { 14 }

  public var destination: MACAddress
  public var source: MACAddress
  /// Of what follows: with a tag, the tag's.
  public var etherType: UInt16

  @inlinable
  public init(destination: MACAddress, source: MACAddress, etherType: UInt16) {
    self.destination = destination
    self.source = source
    self.etherType = etherType
  }

  /// Writes the header at `offset`; traps where it does not fit.
  /// - Returns: the offset after it.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int = 0) -> Int {
    frame.preconditionFits(Self.bytes, at: offset)
    unsafe frame.storeNetwork(destination.bits &<< 16 | source.bits &>> 32, at: offset)
    unsafe frame.storeNetwork(UInt32(truncatingIfNeeded: source.bits), at: offset &+ 8)
    unsafe frame.storeNetwork(etherType, at: offset &+ 12)
    return offset &+ Self.bytes
  }
}

/// A frame whose length was checked: at least an Ethernet header.
public struct EthernetView: ~Escapable {
  /// The whole frame.
  public let bytes: RawSpan

  /// nil when `frame` is shorter than 14 bytes.
  @inlinable @inline(always) @_lifetime(copy frame)
  public init?(_ frame: RawSpan) {
    guard frame.byteCount >= EthernetHeader.bytes else { return nil }
    bytes = frame
  }

  @inlinable @inline(always)
  public var destination: MACAddress { MACAddress(bits: unsafe bytes.networkUInt64(at: 0) &>> 16) }

  // From the destination's last two bytes on, so that the load ends with the EtherType.
  @inlinable @inline(always)
  public var source: MACAddress { MACAddress(bits: unsafe bytes.networkUInt64(at: 6) &>> 16) }

  /// The EtherType after the addresses: a tag's, if there is one.
  @inlinable @inline(always)
  public var etherType: UInt16 { unsafe bytes.networkUInt16(at: 12) }

  /// The header as a value.
  @inlinable
  public var header: EthernetHeader {
    EthernetHeader(destination: destination, source: source, etherType: etherType)
  }

  /// What comes after the 14 bytes.
  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: EthernetHeader.bytes..<bytes.byteCount) }
  }

  /// From the EtherType on: what ``VLANView`` takes when that is a tag's.
  @inlinable
  public var etherTypeAndPayload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: EthernetHeader.bytes - 2..<bytes.byteCount) }
  }
}

/// A VLAN tag (IEEE 802.1Q §9.6): the tag's EtherType and the tag control information.
public struct VLANTag: BitwiseCopyable, Hashable, Sendable {
  /// Bytes of a tag: its EtherType and 2 bytes of control information.
  @inlinable @inline(always)
  public static var bytes: Int { 4 }

  /// Tags that are read: a service tag and a customer tag (IEEE 802.1ad). A third is taken for a payload that
  /// nobody knows, so that no frame makes parsing long.
  @inlinable @inline(always)
  public static var tagsMax: Int { 2 }

  /// Whether an EtherType announces a tag.
  @inlinable @inline(always)
  public static func isTag(_ etherType: UInt16) -> Bool {
    etherType == EtherType.vlan || etherType == EtherType.vlanService
  }

  /// TPID: 0x8100 or 0x88a8.
  public var tagProtocol: UInt16
  /// PCP, 0 to 7.
  public var priority: UInt8
  /// DEI.
  public var dropEligible: Bool
  /// VID, 12 bits; 0 is a tag that bears a priority only.
  public var identifier: UInt16

  @inlinable
  public init(
    tagProtocol: UInt16 = EtherType.vlan, priority: UInt8 = 0, dropEligible: Bool = false, identifier: UInt16
  ) {
    self.tagProtocol = tagProtocol
    self.priority = priority & 0x7
    self.dropEligible = dropEligible
    self.identifier = identifier & 0xfff
  }

  /// Writes tag protocol and control information at `offset`, which is 12 for a frame's first tag; traps where
  /// they do not fit. The EtherType of what follows comes after them and is the caller's to write.
  /// - Returns: the offset after the tag.
  @discardableResult
  @inlinable
  public func write(into frame: inout MutableRawSpan, at offset: Int) -> Int {
    frame.preconditionFits(Self.bytes, at: offset)
    let control = UInt16(priority & 0x7) &<< 13 | (dropEligible ? 0x1000 : 0) | identifier & 0xfff
    unsafe frame.storeNetwork(tagProtocol, at: offset)
    unsafe frame.storeNetwork(control, at: offset &+ 2)
    return offset &+ Self.bytes
  }
}

/// A VLAN tag and the EtherType after it, whose length was checked.
public struct VLANView: ~Escapable {
  /// From the tag's EtherType to the end of the frame.
  public let bytes: RawSpan

  /// nil when `bytes` does not begin with a tag's EtherType, or has less than 6 bytes.
  @inlinable @inline(always) @_lifetime(copy bytes)
  public init?(_ bytes: RawSpan) {
    guard bytes.byteCount >= VLANTag.bytes + 2 else { return nil }
    self.bytes = bytes
    guard VLANTag.isTag(tagProtocol) else { return nil }
  }

  /// TPID.
  @inlinable @inline(always)
  public var tagProtocol: UInt16 { unsafe bytes.networkUInt16(at: 0) }

  @inlinable @inline(always)
  var control: UInt16 { unsafe bytes.networkUInt16(at: 2) }

  /// PCP, 0 to 7.
  @inlinable @inline(always)
  public var priority: UInt8 { UInt8(truncatingIfNeeded: control &>> 13) }

  /// DEI.
  @inlinable @inline(always)
  public var dropEligible: Bool { control & 0x1000 != 0 }

  /// VID.
  @inlinable @inline(always)
  public var identifier: UInt16 { control & 0xfff }

  /// The EtherType of what comes after the tag: perhaps another tag's.
  @inlinable @inline(always)
  public var etherType: UInt16 { unsafe bytes.networkUInt16(at: 4) }

  /// The tag as a value.
  @inlinable
  public var tag: VLANTag {
    VLANTag(tagProtocol: tagProtocol, priority: priority, dropEligible: dropEligible, identifier: identifier)
  }

  /// What comes after the tag and its EtherType.
  @inlinable
  public var payload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: VLANTag.bytes + 2..<bytes.byteCount) }
  }

  /// From the next EtherType on: what another ``VLANView`` takes.
  @inlinable
  public var etherTypeAndPayload: RawSpan {
    @_lifetime(copy self) get { unsafe bytes.extracting(unchecked: VLANTag.bytes..<bytes.byteCount) }
  }
}
