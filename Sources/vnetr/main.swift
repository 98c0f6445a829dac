import ArgumentParser
import Control
import Glibc
import Logging

LoggingSystem.bootstrap { _ in StandardErrorLog() }

do {
  var command = try Vnetr.parseAsRoot()
  try command.run()
} catch let errors as ConfigurationErrors {
  for error in errors.errors { writeToStandardError(error.file == nil ? "vnetr: \(error)" : "\(error)") }
  exit(ExitStatus.failed)
} catch {
  switch Vnetr.exitCode(for: error) {
  case .success:
    // Help and version are errors to ArgumentParser.
    print(Vnetr.fullMessage(for: error))
    exit(ExitStatus.done)
  case .validationFailure:
    let message = Vnetr.message(for: error).split(separator: "\n").joined(separator: " ")
    writeToStandardError("vnetr: \(message); see vnetr help")
    exit(ExitStatus.wrongUsage)
  default:
    // A command that throws an exit code has said all there is to say.
    if !(error is ExitCode) { writeToStandardError("vnetr: \(error)") }
    exit(ExitStatus.failed)
  }
}
